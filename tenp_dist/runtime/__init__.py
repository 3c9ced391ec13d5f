"""Running a ragged checkpoint in transformers.

The text of `ragged_config.py`, `pretrained_config.py`, `buckets.py`, `stored_fp8.py`, `stored_compressed.py`,
`stored_mxfp4.py` and `ragged_model.py` is copied into checkpoints, so that they load where this package is not
installed: they need torch and transformers only.
`auto_classes.py` registers the classes here and makes that copy.
"""
