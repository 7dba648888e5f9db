"""Great Expectations: suites that stations declare as plain data, run in one place."""
