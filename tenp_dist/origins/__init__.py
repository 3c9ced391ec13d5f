"""Sources that are no folder yet: repositories of the Hugging Face Hub, and folders in buckets.

An `Origin` is such a source at one version of it. Its small files (config, index, tokenizer) come first, the headers of
its weights are read by ranges, and its weights come when a stage needs them, all into one folder that is used like any
other then. `hub.py` and `bucket.py` know how to reach them, nobody else does.
"""
