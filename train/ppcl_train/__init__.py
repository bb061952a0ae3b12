"""Training: from a stock model, or from nothing, to a pluggable checkpoint.

Imports point one way; a folder imports only from folders to its left, and from the runtime:

    scenes <- families <- config <- engine <- data <- closed_form, losses <- selectors <- stages <- pipeline <- compare
    <- cli
"""
