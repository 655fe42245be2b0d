"""Surgery over several ranks: who takes part, what they agree on, and the means of their gradients."""
