"""Tables, comparisons and plots of what a run left behind."""
