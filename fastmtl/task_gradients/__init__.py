"""How the gradients of T tasks come about: by backward passes of their losses, collected in a bank, or in one pass."""
