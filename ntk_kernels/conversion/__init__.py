"""How `prefix_to_state` finds a state: centres, closed form, least squares on queries, and the report."""
