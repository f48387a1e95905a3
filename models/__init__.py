"""Small trained models, and the scripts that make them from real data with this project alone."""
