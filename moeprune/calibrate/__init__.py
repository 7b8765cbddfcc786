"""Text to statistics: read data, run the model, see what its routers and experts do."""
