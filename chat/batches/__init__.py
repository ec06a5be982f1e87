"""Many requests in one file, answered when nobody else asks: OpenAI's batches as a kind of run."""
