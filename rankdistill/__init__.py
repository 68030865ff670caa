"""rankdistill: turn an expensive ranker into a retriever that can be served."""

__version__ = "0.1.0"
