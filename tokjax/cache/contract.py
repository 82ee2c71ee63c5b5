"""Shim while the house is rebuilt."""
from tokjax.layer import *
from tokjax.layer import LSE, NOTES, Carry, Params, zeroed
from tokjax.slots import Attend, Bytes, Cache, State, parameters
