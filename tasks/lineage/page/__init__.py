"""The page of an audit: everything that is known of an agent, a reward model or a dataset, in one HTML file."""
