"""The widths of method `global`: the most energy that a budget of neurons can keep in the experts of a whole model.

A neuron is kept where its energy is worth a price that is one for the whole model. `prices.py` looks for the price
that meets the budget, `two_prices.py` for a second one, where what tokens meet has a budget too. At each price they
try, `layer_optimum.py` finds the best few distinct widths of every layer exactly; `bounds.py` and `bounds_of_many.py`
rule out most candidates before that search. `floors.py` holds what each layer keeps at least, and `leftover.py` spends
the neurons that the last price leaves over.
"""
