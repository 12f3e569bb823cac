"""Measurements of sparsekern: protocol in README.md, results in records/*.jsonl."""
