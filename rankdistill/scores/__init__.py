"""Teacher scores: the store, foreign formats, ensembles, and the scored lists that training reads."""
