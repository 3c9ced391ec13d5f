"""What tokens still say of a text, by hand."""

from tenp_dist.calibration.round_trip import RoundTrip, round_trip


def test_whole_text():
    assert round_trip("a bc  d", "a bc  d") == RoundTrip(4, 4, 2, 2)


def test_spaces_gone():
    assert round_trip("def else for", "defelsefor") == RoundTrip(10, 10, 2, 0)


def test_unknown_characters():
    assert round_trip("ab ☃☃☃", "ab [UNK]") == RoundTrip(5, 2, 1, 1)


def test_case_and_compatibility_forms_are_kept():
    assert round_trip("Ab ﬁne", "ab fine") == RoundTrip(6, 6, 1, 1)


def test_adds():
    assert RoundTrip(1, 2, 3, 4).plus(RoundTrip(10, 20, 30, 40)) == RoundTrip(11, 22, 33, 44)
