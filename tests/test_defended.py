"""defend: the strength of a defense that gives a wanted L1 distance on the queries."""

import copy

import pytest
from toys import toy_images, toy_model, toy_splits

from divqat.evaluate.defended import OutOfReach, defend
from divqat.evaluate.subject import Deployed, Subject


def test_a_distance_in_a_spec_chooses_the_strength_of_a_defense_that_is_fitted_once():
    splits, fitted = toy_splits(), {}
    deployed = Deployed(Subject("fp", toy_model().eval()), toy_images(300, seed=3)[0], splits.test)

    def defended(spec):
        return defend(spec, deployed, splits.train, toy_model, 0, fitted)

    near, far = (defended(f"temperature:l1={l1}").measure() for l1 in (0.05, 0.1))
    assert near["l1_queries"] == pytest.approx(0.05, abs=0.01)
    assert far["l1_queries"] == pytest.approx(0.1, abs=0.01)
    assert len(fitted) == 1 and near["settings"] != far["settings"]
    before = copy.deepcopy(fitted)
    with pytest.raises(OutOfReach, match="l1"):
        defended("temperature:l1=1.99")
    assert str(before) == str(fitted)
    assert defended("none").defense is None
