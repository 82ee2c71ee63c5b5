"""The `reduce` slot: sites, rules, stages."""
