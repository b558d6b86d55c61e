"""Whether rewards can be trusted: exploits that must earn none, and figures of a run that show gaming."""
