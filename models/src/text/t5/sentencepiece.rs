//! `spiece.model`: the pieces of a sentencepiece model (Kudo & Richardson 2018) and how it rewrites characters.
//!
//! The file is a protocol buffer, `ModelProto` of `sentencepiece_model.proto`, of which these fields are read: 1, the pieces
//! (1, the piece; 2, its score); 2, the trainer's settings (3, the kind of model); 3, the normalizer's (2, a compiled map of
//! characters).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// What such a file tells.
pub(super) struct SentencePieces {
    /// Pieces by their numbers, with the logarithms of their probabilities.
    pub(super) vocabulary: Vec<(String, f64)>,
    /// The map of characters, in base 64; nothing where they stay as they are.
    pub(super) characters: Option<String>,
}

/// Kinds of models.
const UNIGRAM: u64 = 1;
/// Kinds of fields.
const VARINT: u64 = 0;
const FIXED_64: u64 = 1;
const BYTES: u64 = 2;
const FIXED_32: u64 = 5;

/// One field of a message.
struct Field<'a> {
    number: u64,
    /// Of a whole number.
    varint: u64,
    /// Of everything else.
    bytes: &'a [u8],
}

impl SentencePieces {
    /// Of a file's bytes.
    ///
    /// # Errors
    /// What is wrong with the file.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (mut vocabulary, mut characters) = (Vec::new(), None);
        let mut kind = UNIGRAM;
        for field in fields(bytes)? {
            match field.number {
                1 => vocabulary.push(piece(field.bytes)?),
                2 => {
                    let told = fields(field.bytes)?;
                    kind =
                        told.iter().rfind(|field| field.number == 3).map_or(kind, |it| it.varint);
                }
                3 => {
                    let told = fields(field.bytes)?;
                    let map = told.iter().rfind(|field| field.number == 2);
                    characters = map
                        .filter(|map| !map.bytes.is_empty())
                        .map(|map| STANDARD.encode(map.bytes));
                }
                _ => {}
            }
        }
        if kind != UNIGRAM {
            return Err(
                "is no unigram model, as T5 has; use the tokenizer that belongs to it".into()
            );
        }
        if vocabulary.is_empty() {
            return Err("holds no pieces; fetch it again".into());
        }
        Ok(Self { vocabulary, characters })
    }
}

fn piece(bytes: &[u8]) -> Result<(String, f64), String> {
    let (mut text, mut score) = (String::new(), 0.0);
    for field in fields(bytes)? {
        match field.number {
            1 => {
                let piece = std::str::from_utf8(field.bytes);
                text = piece.map_err(|_| "holds a piece that is no text".to_owned())?.to_owned();
            }
            2 => {
                let number: [u8; 4] = field.bytes.try_into().map_err(|_| damaged())?;
                score = f64::from(f32::from_le_bytes(number));
            }
            _ => {}
        }
    }
    Ok((text, score))
}

fn damaged() -> String {
    "is not a whole sentencepiece model; fetch it again".into()
}

/// The fields of a message, in their order.
fn fields(mut rest: &[u8]) -> Result<Vec<Field<'_>>, String> {
    let mut all = Vec::new();
    while !rest.is_empty() {
        let tag = varint(&mut rest)?;
        let (number, mut varint_value, mut bytes) = (tag >> 3, 0, &rest[..0]);
        let length = match tag & 7 {
            VARINT => {
                varint_value = varint(&mut rest)?;
                0
            }
            FIXED_64 => 8,
            BYTES => usize::try_from(varint(&mut rest)?).map_err(|_| damaged())?,
            FIXED_32 => 4,
            _ => return Err(damaged()),
        };
        if length > 0 {
            (bytes, rest) = rest.split_at_checked(length).ok_or_else(damaged)?;
        }
        all.push(Field { number, varint: varint_value, bytes });
    }
    Ok(all)
}

/// A whole number, seven bits a byte, the lowest first.
fn varint(rest: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = rest.split_first().ok_or_else(damaged)?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(damaged())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_model_is_refused() {
        let piece = [0x0a, 0x05, 0x0a, 0x03, b'a', b'b', b'c'];
        assert_eq!(SentencePieces::parse(&piece).unwrap().vocabulary, [("abc".to_owned(), 0.0)]);
        let byte_pairs = [&piece[..], &[0x12, 0x02, 0x18, 0x02]].concat();
        let refused = |bytes: &[u8]| SentencePieces::parse(bytes).err().unwrap();
        assert!(refused(&byte_pairs).contains("no unigram model"));
        assert!(refused(&[]).contains("no pieces"));
        for end in 1..piece.len() {
            assert!(refused(&piece[..end]).contains("not a whole"), "{end}");
        }
        assert!(refused(&[0xff; 11]).contains("not a whole"));
        assert!(refused(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0x7f]).contains("not a whole"));
    }
}
