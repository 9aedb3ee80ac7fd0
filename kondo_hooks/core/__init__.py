"""The step: a call is screened, the user's loss runs, delight is read, kept rows are replayed with a graph."""
