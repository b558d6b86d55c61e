"""Linear LM head, log-probs and the CIPO loss of its targets."""
