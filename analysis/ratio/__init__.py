"""The FLOPs-to-match ratio of a challenger against the baseline."""
