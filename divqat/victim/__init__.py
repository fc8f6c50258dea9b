"""The black box that an attacker sees, and how models of every format run inside of it."""

from divqat.victim.victim import ANSWERS, Defense, QueryBudgetExceeded, Victim, defense_text

__all__ = ["ANSWERS", "Defense", "QueryBudgetExceeded", "Victim", "defense_text"]
