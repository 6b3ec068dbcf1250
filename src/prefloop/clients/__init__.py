"""What the rest of prefloop asks of models: light protocols, and their forms that speak HTTP."""
