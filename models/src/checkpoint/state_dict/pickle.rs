//! Pickles as data: what an unpickler would be told to do, noted instead of done.
//!
//! Nothing is imported or called. Objects lie in one list and point to each other by number, so nesting costs no
//! stack, and no text is longer than the pickle itself. Known are the binary opcodes of protocols 2 to 5, which
//! `torch.save` writes; see CPython's `Lib/pickletools.py`.

use std::collections::HashMap;

/// Bytes of the longest pickle that is read: a large model's state dict has less than one million.
pub(super) const BYTES: u64 = 64 << 20;
/// Most opcodes: a state dict has about 30 for each tensor.
const OPCODES: usize = 4 << 20;

/// An object's number.
pub(super) type Id = usize;

/// An object, as far as state dicts need it.
#[derive(Debug, PartialEq)]
pub(super) enum Object<'a> {
    Int(i64),
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    /// In the order of insertion; a later entry of a key replaces an earlier one.
    Dict(Vec<(Id, Id)>),
    /// A class or function by module and name.
    Global(&'a str, &'a str),
    /// What calling it would make.
    Call {
        callable: Id,
        arguments: Id,
    },
    /// What the file keeps outside of the pickle.
    Persistent(Id),
    /// None, truth values, floats, bytes, sets.
    Other,
}

/// A pickle that was read to its end.
pub(super) struct Pickle<'a> {
    objects: Vec<Object<'a>>,
    /// The object that was pickled.
    pub(super) root: Id,
}

impl<'a> Pickle<'a> {
    /// Reads a pickle.
    ///
    /// # Errors
    /// What is wrong, and at which byte.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let mut machine = Machine {
            bytes,
            at: 0,
            objects: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        };
        for _ in 0..OPCODES {
            let at = machine.at;
            let stop = machine
                .step()
                .map_err(|problem| format!("{problem} at byte {at} of its pickle"))?;
            if let Some(root) = stop {
                return Ok(Self { objects: machine.objects, root });
            }
        }
        Err(format!("its pickle has more than {OPCODES} opcodes"))
    }

    pub(super) fn get(&self, id: Id) -> &Object<'a> {
        &self.objects[id]
    }

    /// Module, name and arguments of a call.
    pub(super) fn call(&self, id: Id) -> Option<(&'a str, &'a str, &[Id])> {
        let Object::Call { callable, arguments } = self.get(id) else { return None };
        match (self.get(*callable), self.get(*arguments)) {
            (Object::Global(module, name), Object::Tuple(arguments)) => {
                Some((module, name, arguments))
            }
            _ => None,
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    objects: Vec<Object<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack at the marks.
    marks: Vec<usize>,
    memo: HashMap<usize, Id>,
}

impl<'a> Machine<'a> {
    /// One opcode; the root at the last.
    fn step(&mut self) -> Result<Option<Id>, String> {
        let [opcode] = self.array()?;
        match opcode {
            0x80 => drop(self.array::<1>()?), // PROTO
            0x95 => drop(self.array::<8>()?), // FRAME
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.above_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'N' | 0x88 | 0x89 | 0x8f => self.push(Object::Other), // None, True, False, EMPTY_SET
            b'G' => {
                self.array::<8>()?;
                self.push(Object::Other);
            }
            b'K' => {
                let [byte] = self.array()?;
                self.push(Object::Int(byte.into()));
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                self.push(Object::Int(number.into()));
            }
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.push(Object::Int(number.into()));
            }
            0x8a => {
                let [length] = self.array()?;
                self.long(length.into())?;
            }
            0x8b => {
                let length = self.length4()?;
                self.long(length)?;
            }
            b'X' => {
                let length = self.length4()?;
                self.text(length)?;
            }
            0x8c => {
                let [length] = self.array()?;
                self.text(length.into())?;
            }
            0x8d => {
                let length = self.length8()?;
                self.text(length)?;
            }
            b'B' | b'T' => {
                let length = self.length4()?;
                self.bytes(length)?;
            }
            b'C' | b'U' => {
                let [length] = self.array()?;
                self.bytes(length.into())?;
            }
            0x8e | 0x96 => {
                let length = self.length8()?;
                self.bytes(length)?;
            }
            b')' => self.push(Object::Tuple(Vec::new())),
            b']' => self.push(Object::List(Vec::new())),
            b'}' => self.push(Object::Dict(Vec::new())),
            b't' => {
                let items = self.above_mark()?;
                self.push(Object::Tuple(items));
            }
            0x85..=0x87 => {
                let mut items: Vec<Id> =
                    (0x84..opcode).map(|_| self.pop()).collect::<Result<_, _>>()?;
                items.reverse();
                self.push(Object::Tuple(items));
            }
            b'l' => {
                let items = self.above_mark()?;
                self.push(Object::List(items));
            }
            b'd' => {
                let items = self.above_mark()?;
                let pairs = pairs(&items)?;
                self.push(Object::Dict(pairs));
            }
            0x91 => {
                self.above_mark()?; // FROZENSET
                self.push(Object::Other);
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.above_mark()?;
                self.append(items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(&[key, value])?;
            }
            b'u' => {
                let items = self.above_mark()?;
                self.set(&items)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Object::Global(module, name));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.objects[module], &self.objects[name]) {
                    (&Object::Text(module), &Object::Text(name)) => {
                        self.push(Object::Global(module, name));
                    }
                    _ => return Err("a class without a name".into()),
                }
            }
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.call(callable, arguments);
            }
            0x92 => {
                self.pop()?;
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.call(callable, arguments);
            }
            // The state that would be given to the object below; a dict's would be attributes, such as `_metadata`.
            b'b' => drop(self.pop()?),
            b'Q' => {
                let id = self.pop()?;
                self.push(Object::Persistent(id));
            }
            b'q' => {
                let [key] = self.array()?;
                let top = self.top()?;
                self.memo.insert(key.into(), top);
            }
            b'r' => {
                let key = self.length4()?;
                let top = self.top()?;
                self.memo.insert(key, top);
            }
            0x94 => {
                let (key, top) = (self.memo.len(), self.top()?);
                self.memo.insert(key, top);
            }
            b'h' => {
                let [key] = self.array()?;
                self.recall(key.into())?;
            }
            b'j' => {
                let key = self.length4()?;
                self.recall(key)?;
            }
            other => return Err(format!("opcode {other:#04x}, which no state dict has,")),
        }
        Ok(None)
    }

    fn push(&mut self, object: Object<'a>) {
        self.stack.push(self.objects.len());
        self.objects.push(object);
    }

    /// Notes a call; that of a kind of dict is the dict.
    fn call(&mut self, callable: Id, arguments: Id) {
        let dict =
            [("collections", "OrderedDict"), ("collections", "defaultdict"), ("builtins", "dict")];
        let object = match self.objects[callable] {
            Object::Global(module, name) if dict.contains(&(module, name)) => {
                Object::Dict(Vec::new())
            }
            _ => Object::Call { callable, arguments },
        };
        self.push(object);
    }

    fn pop(&mut self) -> Result<Id, String> {
        let above = self.marks.last().copied().unwrap_or(0);
        match self.stack.len() > above {
            true => self.stack.pop().ok_or_else(empty),
            false => Err(empty()),
        }
    }

    fn top(&self) -> Result<Id, String> {
        self.stack.last().copied().ok_or_else(empty)
    }

    fn above_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("no mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn append(&mut self, mut items: Vec<Id>) -> Result<(), String> {
        let top = self.top()?;
        // What other objects do with items is theirs.
        if let Object::List(list) = &mut self.objects[top] {
            list.append(&mut items);
        }
        Ok(())
    }

    fn set(&mut self, items: &[Id]) -> Result<(), String> {
        let (top, pairs) = (self.top()?, pairs(items)?);
        if let Object::Dict(dict) = &mut self.objects[top] {
            dict.extend(pairs);
        }
        Ok(())
    }

    fn recall(&mut self, key: usize) -> Result<(), String> {
        let id = *self.memo.get(&key).ok_or_else(|| format!("nothing memorised as {key}"))?;
        self.stack.push(id);
        Ok(())
    }

    fn long(&mut self, length: usize) -> Result<(), String> {
        let bytes = self.take(length)?;
        let sign = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
        let mut number = [sign; 8];
        self.push(match number.get_mut(..length) {
            Some(low) => {
                low.copy_from_slice(bytes);
                Object::Int(i64::from_le_bytes(number))
            }
            None => Object::Other,
        });
        Ok(())
    }

    fn text(&mut self, length: usize) -> Result<(), String> {
        let text = str::from_utf8(self.take(length)?).map_err(|_| "a text that is no UTF-8")?;
        self.push(Object::Text(text));
        Ok(())
    }

    fn bytes(&mut self, length: usize) -> Result<(), String> {
        self.take(length)?;
        self.push(Object::Other);
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let length =
            self.bytes[self.at..].iter().position(|&byte| byte == b'\n').ok_or_else(short)?;
        let line = str::from_utf8(self.take(length)?).map_err(|_| "a name that is no UTF-8")?;
        self.at += 1;
        Ok(line)
    }

    fn length4(&mut self) -> Result<usize, String> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn length8(&mut self) -> Result<usize, String> {
        usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|_| short())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let bytes = self.bytes[self.at..].get(..length).ok_or_else(short)?;
        self.at += length;
        Ok(bytes)
    }
}

fn pairs(items: &[Id]) -> Result<Vec<(Id, Id)>, String> {
    match items.as_chunks::<2>() {
        (pairs, []) => Ok(pairs.iter().map(|&[key, value]| (key, value)).collect()),
        _ => Err("a key without a value".into()),
    }
}

fn empty() -> String {
    "nothing on the stack".into()
}

fn short() -> String {
    "an end too early".into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_dict_is_read() {
        // pickle.dumps({"a": 1, "b": [2, -3]}, 2)
        let bytes = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01X\x01\x00\x00\x00bq\x02]q\x03(K\x02J\xfd\xff\xff\xffeu.";
        let pickle = Pickle::read(bytes).unwrap();
        let Object::Dict(pairs) = pickle.get(pickle.root) else { panic!("a dict") };
        assert_eq!(pickle.get(pairs[0].0), &Object::Text("a"));
        let Object::List(list) = pickle.get(pairs[1].1) else { panic!("a list") };
        assert_eq!(pickle.get(list[1]), &Object::Int(-3));
    }

    #[test]
    fn calls_are_noted_and_not_made() {
        let pickle = Pickle::read(b"cos\nsystem\nX\x02\x00\x00\x00ls\x85R.").unwrap();
        let (module, name, arguments) = pickle.call(pickle.root).unwrap();
        assert_eq!((module, name), ("os", "system"));
        assert_eq!(pickle.get(arguments[0]), &Object::Text("ls"));
    }

    #[test]
    fn what_ended_another_reader_is_an_error_or_harmless() {
        let mut nested = vec![b']'; 500_000];
        nested.extend(vec![b'a'; 499_999]);
        nested.push(b'.');
        drop(Pickle::read(&nested).unwrap());
        let mut tuples = vec![b')'];
        tuples.extend(vec![0x85; 500_000]);
        tuples.push(b'.');
        drop(Pickle::read(&tuples).unwrap());
        for (bytes, problem) in [
            (&b"X\xff\xff\xff\xff"[..], "end too early at byte 0"),
            (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffa", "end too early"),
            (b")", "end too early"),
            (b"", "end too early"),
            (b".", "nothing on the stack"),
            (b"t", "no mark"),
            (b")(0", "nothing on the stack"),
            (b"}(K\x01u", "without a value"),
            (b"h\x07", "nothing memorised as 7"),
            (b"I1\n.", "0x49"),
        ] {
            let error = Pickle::read(bytes).map(|_| ()).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
        let endless = vec![b'('; OPCODES + 1];
        assert!(Pickle::read(&endless).is_err_and(|error| error.contains("opcodes")));
    }

    proptest! {
        #[test]
        fn no_bytes_end_the_process(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Pickle::read(&bytes);
        }
    }
}
