"""Train the embedded model, and measure what it learned."""
