"""Other ways through a step: windows of several backwards, and decisions before the forward."""
