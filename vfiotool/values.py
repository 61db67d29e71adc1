"""The standard library's frozen `dataclass`, with its methods made when they are first used.

Python takes some 0.3 ms to write and compile the methods of one dataclass, and a command imports a
hundred of them but makes values of a few: this was a third of the start of `bind`. Semantics are
the standard library's, which makes the methods here as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass
else:
    import dataclasses

    # What the standard library adds: made on the first call of one, or look at one.
    _METHODS = ("__init__", "__repr__", "__eq__", "__hash__")
    _TABLES = ("__dataclass_fields__", "__dataclass_params__", "__match_args__")

    def dataclass(*, frozen, slots=False):
        """As `dataclasses.dataclass`, for frozen classes alone."""
        assert frozen, "use the standard library's for what is not frozen"
        return lambda cls: _lazy(cls, slots)

    def _lazy(cls, slots):
        namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
        namespace["__qualname__"] = cls.__qualname__
        if slots:
            cls = _with_slots(cls, namespace)

        def make():
            model = type(cls)(cls.__name__, cls.__bases__, dict(namespace))
            dataclasses.dataclass(frozen=True)(model)
            for name in (*_METHODS, *_TABLES):
                if name in model.__dict__:
                    setattr(cls, name, model.__dict__[name])

        for name in _METHODS:
            if namespace.get(name) is None:
                setattr(cls, name, _later(cls, name, make))
        for name in _TABLES:
            setattr(cls, name, _Table(name, make))
        cls.__setattr__ = _refuse_to_assign
        cls.__delattr__ = _refuse_to_delete
        if slots:
            cls.__getstate__ = _state
            cls.__setstate__ = _set_state
        return cls

    def _with_slots(cls, namespace):
        """`cls` anew with a slot for each annotated field that no base has one for."""
        inherited = {slot for base in cls.__mro__[1:] for slot in getattr(base, "__slots__", ())}
        names = [
            name
            for name, annotation in cls.__annotations__.items()
            if "ClassVar" not in str(annotation)
        ]
        slotted = {name: value for name, value in namespace.items() if name not in names}
        slotted["__slots__"] = tuple(name for name in names if name not in inherited)
        return type(cls)(cls.__name__, cls.__bases__, slotted)

    def _later(cls, name, make):
        def method(self, *args, **kwargs):
            make()
            return getattr(cls, name)(self, *args, **kwargs)

        return method

    class _Table:
        """A class attribute that has itself replaced by what `make` makes."""

        def __init__(self, name, make):
            self._name, self._make = name, make

        def __get__(self, instance, owner):
            self._make()
            return getattr(owner, self._name)

    def _refuse_to_assign(self, name, value):
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def _refuse_to_delete(self, name):
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    def _state(self):
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def _set_state(self, state):
        for field, value in zip(dataclasses.fields(self), state, strict=True):
            object.__setattr__(self, field.name, value)


__all__ = ["dataclass"]
