"""What no rule tells, found out by experiment: which samples do the elements of a result depend on?

A call in which no parameter of the bank takes part is run again, on the same random numbers, with the values of some
samples replaced: by NaN, by infinities, by those of other samples, by larger ones. And backwards, with NaN for the
gradients of some samples. What an untouched sample's elements show then is the verdict. `trials` runs the call again,
`values` chooses samples and makes their values, `forwards` and `backwards` are the two experiments, `verdict` keeps
what they gave, and `experiment` puts them together.
"""
