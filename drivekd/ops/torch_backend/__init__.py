"""The backend that is always there: row-chunked torch with closed-form gradients."""
