"""What a run did, for people: one page, the numbers behind it, and a card for every checkpoint."""
