"""Rows of a benchmark carry no digits that mean nothing, and lose none that do."""

from bench.command import rounded


def test_times_are_rounded_and_counts_are_not():
    times = {"median": 0.70673150185, "rounds": 92}
    row = {"on": "x", "milliseconds": times, "bytes": 34078720.0, "extra_bytes": 17039361}
    row |= {"launches": None, "exact": True, "seconds": [1e-12 / 3, 48.22017967]}
    changes = {
        "milliseconds": {"median": 0.706732, "rounds": 92},
        "seconds": [3.33333e-13, 48.2202],
    }
    assert repr(rounded(row)) == repr(row | changes)
    assert rounded(rounded(row)) == rounded(row)
