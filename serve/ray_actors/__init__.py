"""The Ray actors of an instance: the controller, a proxy, a replica.

Ray imports the class of an actor in every process that receives a handle of it, on a thread of its own. So these
modules import nothing but small ones, and a constructor imports what its actor runs. A replica that loaded what the
controller runs had 0.3 s less for its own start, and user code that imports `penstock.serve` meanwhile could have met
half of a module.
"""
