"""Methods of policy optimisation compared on environments: one recipe, one start, several seeds."""
