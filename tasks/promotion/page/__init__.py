"""One HTML page for one gate decision: the verdict, the reasons in words, every interval, and how to check it all."""
