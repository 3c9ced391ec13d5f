"""What a run did, for people: one page, the numbers behind it, and a card for every checkpoint.

`collect.py` reads the files of a run into one document, which is `report.json`; the page (`page.py`), the charts
(`charts.py`, `maps.py`, `compared.py`, drawn with `svg.py`) and the card (`card.py`) are made from that document alone.
"""
