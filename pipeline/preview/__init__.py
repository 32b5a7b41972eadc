"""One HTML page to judge a keypoint dataset by eye: one pass over its rows, a sample of its pictures, the page."""
