"""Speed, memory and quality, measured against the plain model and the strongest alternative in the same run."""
