"""What every part uses, and what uses none of them."""
