//! What a message comes to in memory, before it is parsed: two bytes can become an input with a name, a shape and a map,
//! so a message within the limit of bytes could ask for a hundred times as much.

use axum::http::StatusCode;
use prost::{
    DecodeError,
    bytes::Buf,
    encoding::{WireType, decode_key, decode_varint},
};

use super::super::error::Problem;

/// What a field that is a message, a string or an entry of a map comes to beside its own bytes, at most.
const FIELD_BYTES: usize = 512;

/// What all fields of a request that no network makes large come to, at most.
const SLACK_BYTES: usize = 64 << 10;

/// A message of the inference protocol, as far as what is in it matters.
#[derive(Clone, Copy)]
enum Message {
    Request,
    Input,
    Contents,
    Other,
}

/// 400 for a `ModelInferRequest` that would take more memory than its own length.
pub(super) fn check(bytes: &[u8]) -> Result<(), Problem> {
    let most = bytes.len() + SLACK_BYTES;
    match weight(Message::Request, bytes) {
        Ok(weight) if weight <= most => Ok(()),
        Ok(weight) => {
            let message = format!(
                "the message has {} bytes and would come to {weight} in memory, the limit is {most}; send the elements of large inputs in raw_input_contents or fp32_contents",
                bytes.len()
            );
            Err(Problem::new(StatusCode::BAD_REQUEST, "message_too_large", message))
        }
        Err(error) => Err(malformed(&error)),
    }
}

/// 400 for what is no message of the protocol.
pub(super) fn malformed(error: &DecodeError) -> Problem {
    let message = format!("the message is not what the method takes: {error}");
    Problem::new(StatusCode::BAD_REQUEST, "malformed_message", message)
}

fn weight(message: Message, mut bytes: &[u8]) -> Result<usize, DecodeError> {
    let mut sum = 0;
    while bytes.has_remaining() {
        let (tag, wire_type) = decode_key(&mut bytes)?;
        match wire_type {
            WireType::Varint => {
                decode_varint(&mut bytes)?;
            }
            WireType::ThirtyTwoBit => bytes = after(bytes, 4),
            WireType::SixtyFourBit => bytes = after(bytes, 8),
            WireType::LengthDelimited => {
                let length = decode_varint(&mut bytes)?;
                let length = usize::try_from(length).unwrap_or(usize::MAX).min(bytes.len());
                let (inside, rest) = bytes.split_at(length);
                bytes = rest;
                sum += match (message, tag) {
                    (Message::Request, 5) => FIELD_BYTES + weight(Message::Input, inside)?,
                    (Message::Request, 4 | 6) => FIELD_BYTES + weight(Message::Other, inside)?,
                    (Message::Input, 5) => weight(Message::Contents, inside)?,
                    // Packed numbers.
                    (Message::Input, 3) | (Message::Contents, 1..=5) => 8 * ends(inside),
                    (Message::Contents, 6 | 7) => length,
                    _ => FIELD_BYTES,
                };
                continue;
            }
            // Groups are in no message of the protocol, and what is in them is passed over.
            WireType::StartGroup | WireType::EndGroup => {}
        }
        sum += 8;
    }
    Ok(sum)
}

fn after(bytes: &[u8], count: usize) -> &[u8] {
    bytes.get(count..).unwrap_or_default()
}

/// How many numbers are packed there.
fn ends(varints: &[u8]) -> usize {
    varints.iter().filter(|byte| **byte < 0x80).count()
}
