"""Numbers about pictures and runs."""
