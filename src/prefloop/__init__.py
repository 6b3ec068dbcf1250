"""prefloop: roll out, judge, curate, train, and prove that the agent got better."""

__version__ = "0.1.0"
