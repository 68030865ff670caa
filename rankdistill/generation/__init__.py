"""Queries and labels made from documents: generators write them, filters drop what would teach the wrong thing."""
