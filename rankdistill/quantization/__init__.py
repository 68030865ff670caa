"""Learned vector quantisation: codebooks that keep the ranking, exported to plain FAISS indexes."""
