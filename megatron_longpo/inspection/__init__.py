"""Looking at pairs: a sample side by side, and a report over all, in the terminal and as one HTML page."""
