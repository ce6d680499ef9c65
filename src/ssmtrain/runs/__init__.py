"""The verbs `runs …`: what runs there are, how far each is, and what to do with them; without torch."""
