"""The black box that an attacker queries, and runners for models of every format."""

from divqat.victim.victim import ANSWERS, Defense, QueryBudgetExceeded, Victim, defense_text

__all__ = ["ANSWERS", "Defense", "QueryBudgetExceeded", "Victim", "defense_text"]
