"""A study: many models that differ in their phase plan, trained as a tree of the stretches that they share."""
