//! Numbers that are read from JSON to the bit; serde_json's own reading may be off by the last one, which adds up where a
//! number is read and written at every vote.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use serde_json::value::RawValue;

/// A number, for where a field's attribute does not reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Exact(#[serde(with = "self")] pub(super) f64);

pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(*value)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let text = Box::<RawValue>::deserialize(deserializer)?;
    text.get().parse().map_err(D::Error::custom)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use understudy_models::noise;

    use super::*;

    #[test]
    fn every_number_is_read_as_it_was_written() {
        for number in 0..100_000 {
            let value = f64::from_bits(noise::uniform_u64(1, number));
            if value.is_finite() {
                let text = serde_json::to_string(&Exact(value)).unwrap();
                let Exact(read) = serde_json::from_str(&text).unwrap();
                assert_eq!(read.to_bits(), value.to_bits(), "{text}");
            }
        }
        assert_eq!(serde_json::from_str::<Exact>("3").unwrap(), Exact(3.0));
        assert!(serde_json::from_str::<Exact>("\"3\"").is_err());
    }
}
