"""Text to tokens: `documents.py` reads sources (files, `datasets` names, chat messages), `corpus.py` tokenises, cuts and
stores them.
"""
