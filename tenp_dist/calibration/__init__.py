"""Text to tokens: `documents.py` reads sources (files, `datasets` names, chat messages), `corpus.py` cuts sequences."""
