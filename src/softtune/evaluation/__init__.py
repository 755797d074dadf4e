"""What a model with an adapter answers, and how well."""
