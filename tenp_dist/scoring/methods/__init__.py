"""A file for each method, which defines `METHOD`: how it ranks the experts of a layer, the neurons of each, or both.

`registry` finds them and says what a method is. A method reads the stored statistics of a layer and nothing else.
"""
